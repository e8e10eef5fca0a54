"""Our models under the interfaces of other libraries: LangChain, LlamaIndex, sentence-transformers and mteb.

``langchain`` and ``llama_index`` are modules of their own, since each needs its library to be imported at all.
"""
