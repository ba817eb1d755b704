"""The web page's words, in Chinese and in English."""

from __future__ import annotations

import re

LANGUAGES = {"zh": "中文", "en": "English"}

_ZH = {
    "title": "看图对话",
    "toybox": "现在由 toybox（识别彩色图形的微型模型）回答。",
    "empty": "添加一张或几张图片，然后提问。",
    "question": "输入问题",
    "add": "＋ 图片",
    "send": "发送",
    "stop": "停止",
    "retry": "重新回答",
    "undo": "撤回",
    "clear": "清空",
    "download": "下载记录",
    "discard": "去掉待发送的图片",
    "waiting": "将随下一个问题发送：",
    "examples": "示例图片：",
    "settings": "生成设置",
    "do_sample": "随机采样",
    "temperature": "温度 temperature",
    "top_p": "核采样 top_p",
    "top_k": "top_k（0 为不限）",
    "repetition_penalty": "重复惩罚 repetition_penalty",
    "max_new_tokens": "回答最长 token 数",
    "seed": "随机种子（空：每次不同）",
    "num_beams": "束搜索宽度 num_beams",
    "cut": "已达到最长 token 数，回答被截断。",
    "stopped": "回答已停止，不完整。",
    "unseen": "对话超出了模型的窗口：模型不再看到这条线以上的内容。",
    "without_effect": "没有开启随机采样，以下设置不起作用：{names}",
    "error": "无法完成",
    "forgotten": "服务器已不再保存之前的对话，这里重新开始。",
    "not_uploaded": "这个文件不是从本页面上传的。",
    "unreadable": "{name}：不是能读取的 PNG、JPEG、WEBP、GIF 或 BMP 图片，或者已损坏。",
    "many_pixels": "{name}：像素过多，最多 {limit} 百万。",
    "many_images": "一次提问最多 {limit} 张图片。",
    "many_beams": "num_beams 最多为 {limit}。",
    "not_whole": "{name} 必须是整数。",
}

_EN = {
    "title": "Chat about images",
    "toybox": "The toybox answers, a tiny model of coloured shapes.",
    "empty": "Add one or more images, then ask.",
    "question": "Ask a question",
    "add": "＋ Image",
    "send": "Send",
    "stop": "Stop",
    "retry": "Retry",
    "undo": "Undo",
    "clear": "Clear",
    "download": "Download",
    "discard": "Remove waiting images",
    "waiting": "With the next question:",
    "examples": "Example images:",
    "settings": "Settings of the answers",
    "do_sample": "Draw at random (do_sample)",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k (0: all)",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "Longest answer, in tokens",
    "seed": "Seed (empty: a new one each time)",
    "num_beams": "Beams (num_beams)",
    "cut": "The answer was cut: it reached the longest length.",
    "stopped": "Stopped: the answer is not complete.",
    "unseen": "The window is full: the model no longer sees what is above this line.",
    "without_effect": "Without drawing at random these have no effect: {names}",
    "error": "That did not work",
    "forgotten": "The server no longer has the earlier conversation; this starts a new one.",
    "not_uploaded": "This file was not uploaded from this page.",
    "unreadable": "{name}: not a PNG, JPEG, WEBP, GIF or BMP image that can be read, or damaged.",
    "many_pixels": "{name}: too many pixels, at most {limit} million are allowed.",
    "many_images": "At most {limit} images go with one question.",
    "many_beams": "num_beams is at most {limit}.",
    "not_whole": "{name} must be an integer.",
}

TEXTS = {"zh": _ZH, "en": _EN}


def accepted_language(header: str) -> str:
    """The interface language for a browser's ``Accept-Language`` header."""
    weighted = []
    for part in header.split(","):
        name, _, parameters = part.partition(";")
        found = re.search(r"q\s*=\s*([\d.]+)", parameters)
        try:
            weight = float(found[1]) if found else 1.0
        except ValueError:
            weight = 0.0
        weighted.append((weight, name.strip().lower()[:2]))
    # The sort is stable: of equal weights the first one counts.
    for _, name in sorted(weighted, key=lambda pair: -pair[0]):
        if name in LANGUAGES:
            return name
    return "en"
