"""The interfaces of other packages, over fastllm's ops."""
