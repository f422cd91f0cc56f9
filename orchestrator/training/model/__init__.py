"""The model of a trial: the base with a new LoRA adapter, and the check that the configuration was applied.

Reading order:

    linear_layers   the linear layers of a base, and those that `all-linear` leaves out
    patterns        ranks and alphas of single layers
    device          the device of this process, and its peak memory
    precision       the dtype of the forward pass, and whether the device supports a trial
    targets         the layers and parameters that a configuration should train, and the values to find there
    peft_model      builds the `PeftModel` of a trial over the shared base
    adapter_init    draws the adapter's first weights
    readback        reads the values back from the live model and optimizer, and compares them with `targets`

Everything here runs in the process that trains, in the thread that trains or sets up the trial. `device` imports torch
inside its functions, because the command line imports it too.
"""
