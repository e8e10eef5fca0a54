"""Routing by intent with a few examples of each and no training: the intent whose examples are nearest, or none.

python examples/intent_routing.py 帮我订一张去上海的高铁票 今天心情不好
"""

import sys

import numpy as np

from qingyu import Embedder

EXAMPLES = {
    "订票": ["订一张明天去北京的机票", "我要买高铁票", "帮我看看去广州的火车"],
    "天气": ["明天会下雨吗", "上海今天多少度", "周末天气怎么样"],
    "音乐": ["放一首周杰伦的歌", "我想听点轻音乐", "下一首"],
    "闹钟": ["明天早上七点叫我起床", "设一个十分钟的倒计时", "取消闹钟"],
}
NEIGHBOURS = 2  # nearest examples of an intent that count
LEAST = 0.3  # mean cosine below which the text is of no intent; choose it on your own texts


def main() -> None:
    """The command line."""
    intents = [intent for intent, texts in EXAMPLES.items() for _ in texts]
    with Embedder.open() as embedder:
        known = embedder.embed([text for texts in EXAMPLES.values() for text in texts])
        for text, vector in zip(sys.argv[1:], embedder.embed(sys.argv[1:]), strict=True):
            cosines = known @ vector
            scores = {
                intent: np.sort(cosines[[name == intent for name in intents]])[-NEIGHBOURS:].mean()
                for intent in EXAMPLES
            }
            best = max(scores, key=lambda intent: scores[intent])
            print(f"{text}\t{best if scores[best] >= LEAST else '其他'}\t{scores[best]:.2f}")


if __name__ == "__main__":
    main()
