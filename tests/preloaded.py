"""What processes of `forks` have behind them besides imports: numba fills its tables when it compiles or loads a
function for the first time, which takes half a second, most of what the start of a worker takes."""

import numba

numba.njit("void()")(lambda: None)
