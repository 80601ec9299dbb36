"""loray.train.data.reading"""
