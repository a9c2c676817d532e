"""The nodes, one file per stage of the graph."""

from comfy_api.v0_0_2 import ComfyExtension, io


class RealEraExtension(ComfyExtension):
    """All RealEra nodes, in workflow order."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # Imported here so that the files of this folder can be imported one by one.
        from .align import LoraAlign
        from .bundled import BundledModel
        from .compare import ClipClassifier, Compare, NudeNetDetector
        from .edit import ApplyErasure, ClosedFormEdit, MergeErasures
        from .files import LoadErasure, SaveErasedCheckpoint, SaveErasure
        from .mining import BeyondSampler, NeighborSampler

        return [
            BundledModel,
            NeighborSampler,
            BeyondSampler,
            ClosedFormEdit,
            LoraAlign,
            ApplyErasure,
            MergeErasures,
            ClipClassifier,
            NudeNetDetector,
            Compare,
            SaveErasure,
            LoadErasure,
            SaveErasedCheckpoint,
        ]
