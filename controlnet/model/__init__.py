"""The network: U-Net, ControlNet, both together, the noise schedule and the loss."""
