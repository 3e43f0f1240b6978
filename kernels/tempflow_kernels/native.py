def available(): return False
def library(): raise RuntimeError("the C++ library of tempflow_kernels is not installed")
def describe(): return "not installed"
