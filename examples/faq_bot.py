"""A FAQ bot: the answer to the question that means the same, or an honest "I do not know".

python examples/faq_bot.py 忘了密码登不上去怎么办
python examples/faq_bot.py        # asks on the terminal
"""

import sys
import tempfile
from pathlib import Path

from qingyu.runtime.search import Document, SearchIndex

FAQ = {
    "怎么重置登录密码？": "在登录页点“忘记密码”，按短信提示设置新密码。",
    "多久能发货？": "付款后四十八小时内发货，节假日顺延。",
    "怎么申请退款？": "在订单详情页点“申请退款”，三个工作日内到账。",
    "可以开发票吗？": "可以，在“我的订单”里点“开发票”，电子发票发到邮箱。",
    "怎么联系人工客服？": "工作日九点到十八点拨打 400 热线，或在会话里输入“人工”。",
}
LEAST = 0.3  # cosine below which nothing in the list is an answer; choose it on your own questions

with tempfile.TemporaryDirectory() as folder, SearchIndex.create(Path(folder) / "faq") as index:
    index.add(Document(question, question, {"answer": answer}) for question, answer in FAQ.items())
    for question in sys.argv[1:] or iter(lambda: input("问："), ""):
        best = index.search(question, k=1)[0]
        print(best.fields["answer"] if best.score >= LEAST else "这个我还不会，请换个问法或联系人工客服。")
