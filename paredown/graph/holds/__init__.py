"""What later steps must hold of a model: pruned zeros, shared values. One contract, one list.

`hold` says what each promises, `every` lists them.
"""
