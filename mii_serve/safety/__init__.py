"""The model's safety checker, and moderation of prompts and pictures by Azure AI Content Safety."""
