"""Processes of this project's code: forked from one that has done the imports, where most of a start goes."""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["__main__", "dllama.cli", "dllama.llama", "dllama.cluster.root", "dllama.cluster.worker", "tests.preloaded"]
)
