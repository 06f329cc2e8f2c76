"""What is written for people to read: pages, figures, drawings and the model card."""
