"""The study's stages, each a class that extends the one it rests on. What a stage computes is kept under a key of its own module
and all that this imports (:mod:`bmoe_utils.study.source`): a change above a stage never touches it, and one below always does.

    data -> base_model -> map_model -> experts   -> joint
                                    -> routers   ->
                                    -> baselines
"""
