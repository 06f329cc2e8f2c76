"""PyTorch weights in and out. torch itself is never needed, and no pickle is executed.

torch_weights   load(path) -> (model, variables), state_dict(model, variables), save(state, path)
torch_files     a file -> its state dict
modules         a state dict -> which module each key belongs to
recognise       keys and shapes -> the config of the model
naming          our parameters <-> timm's, torchvision's and PyTorchVideo's keys
"""
