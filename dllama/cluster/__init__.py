"""One model over several devices, however unequal: each node holds a slice of every layer.

The root has the model and samples; the workers run their slices. README.md beside this file says what they send each
other. Who holds what is pure data, known before anything is loaded: all that slices, sends, receives or counts bytes
reads the plan, and nothing else knows about slices.

The plan:
    node, earlier             what it has to know of a device, and what was known of it at earlier starts
    speeds                    how fast devices are beside each other
    share                     what one node holds of a model, down to rows and columns
    deal, fit                 heads, blocks and rows in proportion to speeds, and within each node's memory
    rounds                    who sends its part to whom in an exchange
    traffic                   what a token moves between nodes, in bytes and seconds
    planner, plan             who takes part; the result

Links:
    messages                  what nodes say to each other
    schema, bounds            what a field may hold, and the bounds of all messages
    wire                      their form on the wire
    key, admission            the cluster's key, and who may connect
    address                   where a worker is, and what answers there
    sockets, links, listener  ZeroMQ's sockets: what they share, the side that connects, the side that listens
    hub                       waiting for all of a node's links at once

Weights on their way:
    slices                    a node's slice of a model, as tensors and as one stream of bytes
    digest                    what makes two models, or two slices, the same
    transfer                  a slice in chunks, both ends
    slice_file, slice_cache   slices on a worker's disk

A node at work:
    job                       a plan as one node gets it
    loading                   its weights made ready, while it goes on talking
    member                    its slice, step by step
    stack                     the same where it works the cloud's part for edges: sequences, passages, adapters
    mesh                      its links to the other nodes during a step
    all_reduce, direct        sums over all nodes; their parts on the short cut past Python

Who does it:
    worker, preparation       a worker; how it gets ready for a plan
    desk, join                its talk with roots and strangers; its links to the other workers
    root, crew                the root; its nodes, in their plan or lost
    recruit, supply           its first words with workers; their jobs and slices
    settings, local           how a root reaches its workers; workers on this machine for a try-out
"""
