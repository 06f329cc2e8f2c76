"""PyTorch weights in and out. torch itself is never needed, and no pickle is executed.

    torch_weights   load(path) -> (model, variables), state_dict(model, variables), save(state, path)
    torch_files     a file -> its state dict
    recognise       a state dict -> which module each key belongs to, and the config that its shapes tell of
    naming          our parameters <-> timm's, torchvision's and PyTorchVideo's keys
"""
