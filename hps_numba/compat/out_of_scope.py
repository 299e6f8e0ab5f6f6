"""What HugeCTR has and hps_numba has not: training of dense networks and dense inference.

Such a name can be imported, so that a script that does not use it runs. Every use of it raises ``OutOfScopeError``.
"""

from __future__ import annotations

from typing import Any, NoReturn

from hps_numba.errors import HpsError

__all__ = ["INFERENCE", "TRAINING", "OutOfScopeError", "no_module", "out_of_scope", "unknown"]

_INSTEAD = "hps_numba serves HugeCTR's embedding lookups (hugectr.inference.HPS, hps_torch, hierarchical_parameter_server)"
_ADVICE = "run the dense network in Torch, TensorFlow or ONNX Runtime on the rows that they return"

#: names of ``hugectr.inference``
INFERENCE = ("CreateInferenceSession", "InferenceModel", "InferenceSession")
#: names of ``hugectr``
TRAINING = (
    "Activation_t",
    "Alignment_t",
    "AllReduceAlgo",
    "AsyncParam",
    "Check_t",
    "CommunicationStrategy",
    "CommunicationType",
    "CompressionStrategy",
    "CreateETC",
    "CreateHMemCache",
    "CreateMOS",
    "CreateOptimizer",
    "CreateSolver",
    "DataReaderParams",
    "DataReaderSparseParam",
    "DataReaderType_t",
    "DataSourceParams",
    "DataSourceType_t",
    "DenseLayer",
    "Distribution_t",
    "EmbeddingCollectionConfig",
    "EmbeddingTableConfig",
    "Embedding_t",
    "FcPosition_t",
    "FileSystemType_t",
    "GroupDenseLayer",
    "GroupLayer_t",
    "HybridEmbeddingParam",
    "HybridEmbeddingType",
    "Initializer_t",
    "Input",
    "Layer_t",
    "LrPolicy_t",
    "MetricsType",
    "Model",
    "Optimizer_t",
    "RawType_t",
    "Regularizer_t",
    "Solver",
    "SourceType_t",
    "SparseEmbedding",
    "TrainPSType_t",
    "Tensor_t",
    "Update_t",
)


class OutOfScopeError(HpsError, AttributeError, NotImplementedError):
    """Something of HugeCTR that hps_numba has not, and does not plan."""


class _OutOfScope(type):
    """The class of such names: classes that can be named, subclassed and tested for, and nothing else."""

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise OutOfScopeError(_sentence(cls))

    def __getattr__(cls, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)  # protocols ask for such names, and take this for an answer
        raise OutOfScopeError(_sentence(cls))


def _sentence(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}: training and dense inference are out of scope: {_INSTEAD}; {_ADVICE}"


def out_of_scope(module: str, name: str) -> type:
    """What stands for ``module.name``."""
    return _OutOfScope(name, (), {"__module__": module, "__doc__": f"Out of scope: {_INSTEAD}."})


def unknown(module: str, name: str) -> AttributeError:
    """The error for a name that a module of HugeCTR's has not here."""
    return AttributeError(f"module {module!r} has no attribute {name!r}: {_INSTEAD}, nothing else of it", name=name)


def no_module(name: str) -> ModuleNotFoundError:
    """The error for a module of HugeCTR's that is not here."""
    return ModuleNotFoundError(f"No module named {name!r}: {_INSTEAD}, nothing else of it", name=name)
