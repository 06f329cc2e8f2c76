"""The table behind the synthetic heart: moments, shares, correlations and prevalences, each with
where it comes from.

The table follows the literature and is frozen: no number here was or may be adjusted to a training
result. "assumption" marks a number without a published source; "implied" one that follows from
published numbers. Every correlation is stated either within sex or pooled over both sexes;
`population` solves the generator from it.
"""

from typing import NamedTuple

MEN = 0.48  # share of men, about that of UK Biobank imaging; assumption

_PETERSEN = "Petersen 2017, JCMR 19:18, UK Biobank, healthy, 45-74 y"
_PETERSEN_RISK = "Petersen 2017, PLoS One 12:e0185114, UK Biobank, n = 4,651"


class Moments(NamedTuple):
  """Mean and SD of a quantity in women and men, and the family of its distribution within sex."""

  women: tuple[float, float]
  men: tuple[float, float]
  family: str  # "normal" or "lognormal"
  source: str


COVARIATES = {
  "age": Moments((61, 7.5), (62, 7.5), "normal", _PETERSEN_RISK),  # years
  "height": Moments((163, 6), (176, 7), "normal", _PETERSEN_RISK),  # cm
  # kg/m2; family: assumption
  "bmi": Moments((26.2, 4.6), (27.1, 3.9), "lognormal", _PETERSEN_RISK),
}

# LVESV, LVSV, LVCO, RVESV and RVSV follow from these by identity. The mean ejection fractions are
# one minus the ratio of the published mean volumes (they round to, or within 0.6 points of, the
# published means); lognormal: assumption.
PHENOTYPES = {
  # ml
  "LVEDV": Moments((124, 21), (166, 32), "lognormal", _PETERSEN),
  # g
  "LVM": Moments((70, 13), (103, 21), "lognormal", f"{_PETERSEN}: mass index x body surface"),
  # %
  "LVEF": Moments((60.5, 5), (58.4, 5), "normal", f"{_PETERSEN}; means implied by LVESV / LVEDV"),
  # ml
  "RVEDV": Moments((130, 24), (182, 36), "lognormal", _PETERSEN),
  # %
  "RVEF": Moments((57.7, 6), (53.3, 6), "normal", f"{_PETERSEN}; means implied by RVESV / RVEDV"),
  # bpm
  "heart_rate": Moments(
    (66, 9), (62, 10), "lognormal", "women: PMC3825808 table 2; men: assumption"
  ),
}

# Not drawn: what the identities must reproduce.
DERIVED = {
  "LVESV": Moments((49, 11), (69, 16), "implied", _PETERSEN),
  "LVSV": Moments((75, 14), (96, 20), "implied", _PETERSEN),
  "RVESV": Moments((55, 15), (85, 22), "implied", _PETERSEN),
}

# Only what carries phenotypes. The gains multiply the QRS and T waves of the ECG template.
ECG_PARAMETERS = {
  # ms
  "qrs_duration": Moments((85, 8), (95, 9), "normal", "women: PMC3825808 table 2; men: assumption"),
  "qrs_gain": Moments((0.975, 0.2), (1.025, 0.2), "lognormal", "assumption"),
  "t_gain": Moments(
    (0.60, 0.15), (0.66, 0.165), "lognormal", "assumption; T waves are taller in men"
  ),
}


class Share(NamedTuple):
  """Share of variance that demographics explain, and in which direction they act."""

  share: float
  # "pooled": regression on sex, age, height and weight; "within": without sex
  scope: str
  # relative weights of standardised age, height and BMI; assumption
  direction: tuple[float, float, float]
  source: str


DEMOGRAPHIC_SHARES = {
  # volumes fall with age: Petersen, JCMR
  "LVEDV": Share(0.522, "pooled", (-0.3, 0.6, 0.5), _PETERSEN_RISK),
  "LVM": Share(0.655, "pooled", (-0.1, 0.5, 0.8), _PETERSEN_RISK),
  # flat with age: Petersen, JCMR
  "LVEF": Share(0.067, "pooled", (0.0, 0.9, -0.44), _PETERSEN_RISK),
  "RVEDV": Share(0.522, "pooled", (-0.3, 0.6, 0.5), "assumption: as LVEDV"),
  "RVEF": Share(0.01, "within", (0.0, 0.9, -0.44), "assumption"),
  "heart_rate": Share(0.01, "within", (0.0, -0.3, 1.0), "assumption"),
}
DERIVED_SHARES = {"LVESV": 0.416, "LVSV": 0.412}  # not drawn: must be reproduced; _PETERSEN_RISK


class Correlation(NamedTuple):
  first: str
  second: str
  r: float
  scope: str  # "pooled" over both sexes or "within" sex
  source: str


PHENOTYPE_CORRELATIONS = (
  Correlation("LVEDV", "LVM", 0.65, "within", "assumption"),
  Correlation(
    "LVEDV", "LVEF", -0.10, "within", "implied by the SDs of LVESV and LVSV (Petersen 2017)"
  ),
  Correlation(
    "LVEDV", "RVEDV", 0.85, "within", "assumption: both ventricles eject the same volume"
  ),
  Correlation("LVEDV", "RVEF", -0.15, "within", "assumption"),
  Correlation(
    "LVEDV", "heart_rate", -0.20, "within", "assumption; sign of Ma 2023, UK Biobank, n = 20,062"
  ),
  Correlation("LVM", "LVEF", -0.10, "within", "assumption"),
  Correlation("LVM", "RVEDV", 0.60, "within", "assumption"),
  Correlation("LVM", "RVEF", -0.10, "within", "assumption"),
  Correlation("LVM", "heart_rate", -0.10, "within", "assumption"),
  Correlation("LVEF", "RVEDV", -0.05, "within", "assumption"),
  Correlation("LVEF", "RVEF", 0.60, "within", "assumption: both ventricles eject the same volume"),
  Correlation("LVEF", "heart_rate", -0.10, "within", "assumption; sign of Ma 2023"),
  Correlation("RVEDV", "RVEF", -0.25, "within", "implied by the SD of RVESV (Petersen 2017)"),
  Correlation("RVEDV", "heart_rate", -0.20, "within", "assumption; sign of Ma 2023"),
  Correlation("RVEF", "heart_rate", -0.10, "within", "assumption"),
)

# An ECG parameter depends on the phenotypes of its rows; its correlations with the others follow
# from these.
ECG_CORRELATIONS = (
  Correlation(
    "qrs_duration", "LVM", 0.59, "pooled", "J Electrocardiol 2006;39:67, 71 healthy adults"
  ),
  Correlation(
    "qrs_duration",
    "LVEDV",
    0.45,
    "pooled",
    "Hakacova 2010, LV length; volume for length: assumption",
  ),
  Correlation(
    "qrs_duration", "LVEF", -0.10, "within", "assumption; sign of MESA, n = 1,615 (women)"
  ),
  Correlation("t_gain", "LVEF", 0.25, "within", "assumption; sign of Biering-Sorensen 2018 (ARIC)"),
  Correlation("t_gain", "LVM", -0.15, "within", "assumption; sign of Biering-Sorensen 2018 (ARIC)"),
)
# Of the voltage as recorded, SV1 + max(RV5, RV6), nuisance included; pooled 0.25 in J
# Electrocardiol 2006;39:67.
SOKOLOW_LYON = Correlation("qrs_gain", "LVM", 0.28, "within", "JCMR 2009;11:2, 101 men, LVM / BSA")

# Nuisance of a recording: says nothing about the heart. Amplitudes are medians in mV with the SD of
# their logarithm.
ROTATION_DEG = 15.0  # SD of the rotation about each of the three axes; assumption
TORSO_GAIN = 0.18  # SD of the logarithm of one gain on all leads; assumption
WANDER = (0.06, 0.5)  # assumption
MAINS = (0.004, 0.6)  # 50 Hz; assumption
EMG = (0.008, 0.4)  # assumption
# SD of log voltage that ROTATION_DEG causes on the template; implied (tests measure it)
SOKOLOW_LYON_ROTATION = 0.094


class Disease(NamedTuple):
  """A case is a liability (unit variance) above the threshold that gives the prevalence."""

  prevalence: float
  # of within-sex standard scores, and of "sex" (1 = male) standardised; assumption
  weights: dict[str, float]
  source: str


DISEASES = {
  "HF": Disease(
    0.030, {"LVEF": -0.50, "LVEDV": 0.20, "age": 0.20, "bmi": 0.15, "sex": 0.10}, "assumption"
  ),
  "CM": Disease(0.010, {"LVEF": -0.50, "LVM": 0.35, "sex": 0.15}, "assumption"),
  "MI": Disease(0.035, {"LVEF": -0.35, "t_gain": -0.15, "age": 0.20, "sex": 0.30}, "assumption"),
  "AF": Disease(0.040, {"age": 0.35, "heart_rate": 0.20, "LVEF": -0.20, "sex": 0.15}, "assumption"),
  "CAD": Disease(
    0.090, {"age": 0.30, "bmi": 0.15, "t_gain": -0.15, "LVEF": -0.10, "sex": 0.30}, "assumption"
  ),
  "SCD": Disease(
    0.010, {"LVEF": -0.35, "qrs_duration": 0.25, "LVM": 0.20, "sex": 0.15}, "assumption"
  ),
  "PH": Disease(0.012, {"RVEF": -0.45, "RVEDV": 0.30, "age": 0.15}, "assumption"),
  "LVH": Disease(
    717 / 48835, {"LVM": 0.75, "age": 0.10, "bmi": 0.10}, "prevalence: Naderi 2026, UK Biobank"
  ),
}
FIBRILLATING = 0.30  # share of AF subjects whose recording shows it; assumption
