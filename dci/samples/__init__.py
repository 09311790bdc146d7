"""Folders of sampled images: planned, shared among workers, resumed, read again."""
