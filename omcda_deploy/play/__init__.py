"""A team in a simulator or against recorded episodes: collect, evaluate, replay."""
