"""SLIDE in one cell: who is served, by which model, with how much spectrum and at which clock.

Reproduces: the method of arXiv 2512.20946 (inference that runs while the model downloads; the most users
served in time by model provisioning, spectrum and clocks), against downloading first and inferring then.

    python -m launch.main --config=configs/slide.py            # half a minute on 2 cores
    python -m launch.main --config=configs/slide.py:smoke      # seconds
    python -m launch.main --config=configs/slide.py --config.scenario.path=cell.json
"""

from ml_collections import ConfigDict

from slide_jax.errors import unknown_name


def default(config: ConfigDict) -> ConfigDict:
    """The plain setting: every user has compute of 25-55% of its deadline, so rho is about 0.6."""
    return config


def smoke(config: ConfigDict) -> ConfigDict:
    """Everything once, in seconds: twelve users and twenty drops of short sweeps."""
    config.setting.users = 12
    config.monte_carlo.update(
        drops=20,
        users=12,
        bandwidth_factors=(0.5, 1.0),
        patience=(0.8, 1.0),
        user_counts=(6, 12),
        rhos=(0.25, 0.5, 2.0),
    )
    return config


def shannon(config: ConfigDict) -> ConfigDict:
    """The cell's power is spread over a user's share: a wider share is less efficient, a narrow one more."""
    config.setting.rate_model = "shannon"
    return config


def urban(config: ConfigDict) -> ConfigDict:
    """Buildings: log-normal shadowing of 8 dB, and a direct path of as much power as all others (Rician)."""
    config.cell.update(shadowing_db=8.0, rician_k=1.0)
    return config


PRESETS = {preset.__name__: preset for preset in (default, smoke, shannon, urban)}


def get_config(preset: str = "default") -> ConfigDict:
    """Returns the config of a preset (see `PRESETS`)."""
    config = ConfigDict()
    config.experiment = "slide"
    config.seed = 0
    config.solver = "all"  # all | exact | relaxed | milp | dai | ...: the one of allocation.json; all: exact
    config.left_over = "none"  # none | proportional | min_max: what exact and dai do with spare spectrum

    scenario = config.scenario = ConfigDict()
    scenario.path = ""  # a scenario file instead of a drawn cell; then nothing below but milp matters

    setting = config.setting = ConfigDict()
    setting.models = ("resnet50", "resnet152", "vit_b16")  # names of slide_jax.profiles
    setting.bits_per_parameter = 8.0
    setting.batch_size = 1  # examples of a task
    setting.users = 100  # of the drop that is solved
    setting.bandwidth_hz = 1e8
    setting.rate_model = "linear"  # linear | shannon
    setting.accuracy_min = 0.7  # the least that a user accepts, uniform between the two
    setting.accuracy_max = 0.81
    setting.deadline_min_s = 2.0
    setting.deadline_max_s = 8.0
    setting.compute_min = 0.25  # compute at the top clock as a share of the deadline
    setting.compute_max = 0.55
    setting.patience = 1.0  # factor on every deadline once the devices are drawn
    setting.f_min_hz = 3e8
    setting.f_max_hz = 1.3e9
    setting.kappa_j_per_hz2_cycle = 1e-28
    setting.static_power_w = 0.0
    setting.energy_min = 1.0  # energy budget over what the smallest admissible model consumes
    setting.energy_max = 4.0

    cell = config.cell = ConfigDict()
    cell.radius_m = 250.0
    cell.minimum_distance_m = 10.0
    cell.power_dbm = 33.0  # over the reference bandwidth
    cell.reference_bandwidth_hz = 1e8
    cell.noise_figure_db = 7.0
    cell.path_loss_constant_db = 128.1  # at 1 km
    cell.path_loss_per_decade_db = 37.6
    cell.shadowing_db = 0.0  # standard deviation
    cell.rician_k = 0.0  # power of the direct path over that of all others; 0: Rayleigh fading
    cell.efficiency_cap_bps_hz = 7.4

    monte_carlo = config.monte_carlo = ConfigDict()
    monte_carlo.drops = 2000  # at every point
    monte_carlo.users = 100  # in a drop; not those of the drop that is solved
    monte_carlo.bandwidth_factors = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # of the spectrum
    monte_carlo.patience = (0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0)  # factors on the deadlines
    monte_carlo.user_counts = (10, 20, 40, 70, 100, 150, 200)
    monte_carlo.rhos = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # compute over download

    milp = config.milp = ConfigDict()
    milp.time_limit_s = 20.0

    if preset not in PRESETS:
        raise unknown_name("config", preset, PRESETS)
    return PRESETS[preset](config)
