"""The paper's comparisons at reduced scale: a list of cells, a resuming runner, a JSON per cell, tables from them."""
