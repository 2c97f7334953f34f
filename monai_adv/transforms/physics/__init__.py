"""Physical changes of MR images with explicit parameters, as MONAI transforms; attacks search their worst case."""

from monai_adv.transforms.physics.effect import Effect
from monai_adv.transforms.physics.geometry import Affine, Deformation, GeometricEffect, jacobian_determinant
from monai_adv.transforms.physics.intensity import BiasField, Gamma
from monai_adv.transforms.physics.kspace import Ghosting, Gibbs, KSpaceEffect, Motion
from monai_adv.transforms.physics.named import (
    PhysicalBiasField,
    PhysicalBiasFieldd,
    PhysicalGamma,
    PhysicalGammad,
    RandPhysicalBiasField,
    RandPhysicalBiasFieldd,
    RandPhysicalGamma,
    RandPhysicalGammad,
)
from monai_adv.transforms.physics.named_geometry import (
    PhysicalAffine,
    PhysicalAffined,
    PhysicalDeformation,
    PhysicalDeformationd,
    RandPhysicalAffine,
    RandPhysicalAffined,
    RandPhysicalDeformation,
    RandPhysicalDeformationd,
)
from monai_adv.transforms.physics.named_kspace import (
    PhysicalGhosting,
    PhysicalGhostingd,
    PhysicalGibbs,
    PhysicalGibbsd,
    PhysicalMotion,
    PhysicalMotiond,
    PhysicalRician,
    PhysicalRiciand,
    RandPhysicalGhosting,
    RandPhysicalGhostingd,
    RandPhysicalGibbs,
    RandPhysicalGibbsd,
    RandPhysicalMotion,
    RandPhysicalMotiond,
    RandPhysicalRician,
    RandPhysicalRiciand,
)
from monai_adv.transforms.physics.named_synthesis import (
    PhysicalSynthesis,
    PhysicalSynthesisd,
    RandPhysicalSynthesis,
    RandPhysicalSynthesisd,
)
from monai_adv.transforms.physics.noise import Rician
from monai_adv.transforms.physics.synthesis import Synthesis
from monai_adv.transforms.physics.transforms import (
    PhysicalTransform,
    PhysicalTransformd,
    RandPhysicalTransform,
    RandPhysicalTransformd,
)

EFFECTS: dict[str, type[Effect]] = {
    effect.name: effect
    for effect in (Deformation, Affine, BiasField, Gamma, Motion, Ghosting, Gibbs, Rician, Synthesis)
}
"""Physical changes by name."""

__all__ = [
    "EFFECTS",
    "Affine",
    "BiasField",
    "Deformation",
    "Effect",
    "Gamma",
    "GeometricEffect",
    "Ghosting",
    "Gibbs",
    "KSpaceEffect",
    "Motion",
    "PhysicalAffine",
    "PhysicalAffined",
    "PhysicalBiasField",
    "PhysicalBiasFieldd",
    "PhysicalDeformation",
    "PhysicalDeformationd",
    "PhysicalGamma",
    "PhysicalGammad",
    "PhysicalGhosting",
    "PhysicalGhostingd",
    "PhysicalGibbs",
    "PhysicalGibbsd",
    "PhysicalMotion",
    "PhysicalMotiond",
    "PhysicalRician",
    "PhysicalRiciand",
    "PhysicalSynthesis",
    "PhysicalSynthesisd",
    "PhysicalTransform",
    "PhysicalTransformd",
    "RandPhysicalAffine",
    "RandPhysicalAffined",
    "RandPhysicalBiasField",
    "RandPhysicalBiasFieldd",
    "RandPhysicalDeformation",
    "RandPhysicalDeformationd",
    "RandPhysicalGamma",
    "RandPhysicalGammad",
    "RandPhysicalGhosting",
    "RandPhysicalGhostingd",
    "RandPhysicalGibbs",
    "RandPhysicalGibbsd",
    "RandPhysicalMotion",
    "RandPhysicalMotiond",
    "RandPhysicalRician",
    "RandPhysicalRiciand",
    "RandPhysicalSynthesis",
    "RandPhysicalSynthesisd",
    "RandPhysicalTransform",
    "RandPhysicalTransformd",
    "Rician",
    "Synthesis",
    "jacobian_determinant",
]
