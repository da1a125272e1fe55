"""The chapters, run headless. In reading order:

    runner          a plan, its chapters, a run; site: the pages that show it
    places          where a run may write
    sweep, matrix   many runs at once; the papers' whole matrix, with its estimated cost
    engine, worker  calls in processes of their own, here or on a cluster
"""
