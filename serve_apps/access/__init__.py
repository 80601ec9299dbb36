"""Files of the page that shows an OpenAPI document."""
