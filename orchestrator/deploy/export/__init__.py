"""Export an adapter: merge or convert it, check the result against the adapter, seal it, and push it to the hub.

Modules, in reading order:

    export           the whole procedure: write beside the target, check, seal, rename
    base_files       the weights of a base model, read one at a time
    merge            adapter + base -> one model in 16 bits, weight by weight
    gguf, converter  a merged model as llama.cpp's file
    ray_serve        the config file of a Ray Serve LLM application
    check            loads the export back and compares its answers with the adapter's
    parity           the comparison, and its tolerances
    routing          compares the routers of models with experts by themselves
    memory_limit     free memory of the machine and of its container
    private_details  notes on paths of this machine that a bundle contains
    push             one commit to a model repo of the hub
"""
