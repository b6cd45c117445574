"""Settings for all tests."""

from hypothesis import settings

# A timing never fails a test: machines that run these may be busy.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
