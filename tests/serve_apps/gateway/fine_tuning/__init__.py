"""Tests of serve_apps.gateway.fine_tuning."""
