"""The inner loops, and the only place that knows CPUs.

``cpu`` asks what this one can do and chooses; ``isa``, ``x86`` and ``arm`` are what differs between them, behind one
small interface; ``emit`` lets a kernel be written as LLVM vector code, ``tags`` lets one source serve every format,
``jit`` compiles and caches. The kernels themselves: ``packed`` (quantised products), ``dot`` (float products),
``attention``, ``elementwise``; and ``team``, the threads that run them.
"""
