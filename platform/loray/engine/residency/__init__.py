"""loray.engine.residency"""
