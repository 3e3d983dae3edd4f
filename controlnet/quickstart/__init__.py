"""The quickstart: a data set of drawn scenes, a small base model, and a ControlNet trained on them in minutes."""
