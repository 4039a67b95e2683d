"""One model over several devices, however unequal: each node holds a slice of every layer.

So far only the plan is here, which says who holds what before anything is loaded or sent. It is pure data: everything
that slices, sends, receives or counts bytes reads it, and nothing else knows about slices.

``node`` describes a device, ``share`` what one holds of a model; ``deal`` splits heads, blocks and rows, ``fit`` makes
shares of them that memory holds, ``traffic`` counts what a token moves between nodes; ``plan`` is the result, and
``planner`` decides who takes part:

from dllama.cluster.node import NodeSpec
from dllama.cluster.planner import make_plan

nodes = [NodeSpec("root", read_speed=9e9, memory=8 << 30), NodeSpec("10.0.0.2:9998", read_speed=4e9)]
plan = make_plan(config, nodes)
for share in plan.shares:
    print(share.node.name, share.heads, share.kv_heads, share.slices["o"].columns)
print(plan.traffic, plan.step_seconds())
"""
