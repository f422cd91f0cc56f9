"""Serve adapters over HTTP with OpenAI's protocol.

Modules, in reading order:

    serve           plans a service: adapters, engine, port, token; then runs it
    vllm            command line of `vllm serve`
    adapter_server  an adapter that answers many requests at once, by transformers' continuous batching
    api             the HTTP application for the engine `transformers`
"""
