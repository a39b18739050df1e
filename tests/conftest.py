"""One setting for all property tests: no deadline, since CI's machine may pause."""

from hypothesis import settings

settings.register_profile("ditq", deadline=None, max_examples=50)
settings.load_profile("ditq")
