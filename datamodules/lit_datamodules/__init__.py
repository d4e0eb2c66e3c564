"""Data for personalization: concept folders, WebDataset streams, augmentation, captions."""
