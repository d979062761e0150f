# SPDX-License-Identifier: Apache-2.0
"""Training of every stage: teacher, CFG distillation, MeanFlow, predictor.

:func:`disca.distill.run.train` runs the stages of a configuration;
:func:`disca.distill.config.load_config` reads one.
"""
