"""The losses that are minimised: pure functions, for people who write their own loop."""

from apd_lens._checks import checked
from apd_lens.losses import _outputs, _weights

faithfulness_loss = checked(_weights.faithfulness_loss)
minimality_loss = checked(_outputs.minimality_loss)
simplicity_loss = checked(_weights.simplicity_loss)
hidden_activation_loss = checked(_outputs.hidden_activation_loss)
kl_divergence = checked(_outputs.kl_divergence)
lp_sparsity = checked(_weights.lp_sparsity)
