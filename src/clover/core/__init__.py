"""What every room stands on: records, recipes, assets, run folders, errors."""
