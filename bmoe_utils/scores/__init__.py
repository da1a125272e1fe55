"""How good the answers are. In reading order:

    predictions   what one method said about every item, and running it over a loader
    metrics       calibration, accuracy and ranking, as pure functions of arrays
    tables        methods compared over seeds
    calibration   calibration errors without the bias of the bins
    significance  which differences are more than luck
    decisions     answer or abstain
"""
