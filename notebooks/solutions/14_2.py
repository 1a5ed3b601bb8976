"""Both limits."""


def answer(ttft_s, gaps_s, ttft_limit_s, gap_limit_s):
    return ttft_s <= ttft_limit_s and all(gap_s <= gap_limit_s for gap_s in gaps_s)
