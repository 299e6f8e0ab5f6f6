"""Triton Inference Server: tables as a model of its Python backend, with HugeCTR's protocol and a tensor for each table.

``repository`` writes what Triton loads, ``model`` is what runs in it, ``dense`` a dense Torch model for the next step of an
ensemble. ``python_backend`` is the only place that knows the backend's own module.
"""
