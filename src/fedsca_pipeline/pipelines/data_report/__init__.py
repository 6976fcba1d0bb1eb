"""The data report: pages on the sites' raw data and what is wrong with them. Nothing is trained."""
