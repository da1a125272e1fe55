"""Functions for other processes to call; a module of their own, since importing a test file takes seconds."""
import os
import time


def die(by: int) -> str:
    if by:
        os.kill(os.getpid(), by)
    return "alive"


def card(seconds: float) -> str:
    time.sleep(seconds)
    return os.environ["CUDA_VISIBLE_DEVICES"]
