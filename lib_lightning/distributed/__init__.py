"""The interface of a process group, and its implementation with `torch.distributed`."""
