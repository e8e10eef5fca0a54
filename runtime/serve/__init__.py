"""``qingyu serve``: models over HTTP, in the forms of OpenAI's API and of text-embeddings-inference (extra ``serve``).

``server`` runs the process, ``protocol`` keeps bad clients from hurting others, ``app`` takes requests through the one
table of ``routes``, ``service`` holds the models; ``statuses`` and ``bodies`` say what is answered and what may be
asked, and ``openapi`` writes both down.
"""
