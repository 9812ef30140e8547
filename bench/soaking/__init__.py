"""The parts of `python -m bench soak`: the requests it sends, and the processes it watches."""
