"""What one needs beside a decomposition of a language model: prompts, general text, and tokens in words.

capitals = apd.language.Template("The capital of {country} is").prompts(tokenizer, country=["France", "Italy"])
known = apd.language.known(model, capitals.batch)
texts = apd.language.sample_texts(model, n=384, length=48)
print(apd.language.component_tokens(decomposition, [capitals.batch], tokenizer))
"""

from apd_lens.language._forgetting import Forgetting as Forgetting
from apd_lens.language._forgetting import forgetting as forgetting
from apd_lens.language._known import Known as Known
from apd_lens.language._known import known as known
from apd_lens.language._samples import sample_texts as sample_texts
from apd_lens.language._template import Prompts as Prompts
from apd_lens.language._template import Template as Template
from apd_lens.language._tokens import ComponentTokens as ComponentTokens
from apd_lens.language._tokens import component_tokens as component_tokens
