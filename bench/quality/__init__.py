"""How well things erase: tables, attacks, costs, and the field's protocols."""
