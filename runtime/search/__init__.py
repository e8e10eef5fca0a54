"""Search over documents by meaning, and by words: from vectors to answers.

``contract`` says what a store of vectors is; it needs nothing but numpy. The store on the device needs the extra
``search``, which is asked for when an index is opened.
"""
