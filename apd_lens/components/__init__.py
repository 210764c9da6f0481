"""Parameter components: factors, their algebra, measures and products."""

from apd_lens._checks import checked
from apd_lens.components import _measures, _products
from apd_lens.components._measures import random_components as random_components

masked_product = checked(_products.masked_product)
component_outputs = checked(_products.component_outputs)
singular_values = checked(_measures.singular_values)
effective_rank = checked(_measures.effective_rank)
input_share = checked(_measures.input_share)
output_share = checked(_measures.output_share)
