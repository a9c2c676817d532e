// What nodes say, in Chinese: {} is any text, and {0}, {1} are the texts that it stood for.
const MESSAGES = [
  ["{}; the CLIP is that of {}", "{0}；CLIP 属于 {1}"],
  ["{}, {} that you named are preserved", "{0}，保留您列出的 {1} 条"],
  ["{}, {} beyond {} are preserved", "{0}，保留 {1} 个外围{2}"],
  ["{} neighbour {} are erased too", "一并擦除 {0} 个邻近{1}"],
  ["words", "词"],
  ["points", "点"],
  ["{}; {} of the {} words drawn (✓) change strongly", "{0}；画出的 {2} 个词（✓）中有 {1} 个变化明显"],
  ["{} words move at least half of the way to the anchor", "{0} 个词向锚点移动至少一半"],
  ["saved {}", "已保存 {0}"],
  ["{} steps; mean loss of the last {}: {}", "{0} 步；最后 {1} 步的平均损失：{2}"],
  ["line {}, {}, has no '->': write 'concept -> anchor', for example 'airplane -> tree'",
    "第 {0} 行 {1} 没有“->”：请写成“概念 -> 锚点”，例如 airplane -> tree"],
  ["line {}: {} is in line {} already: keep one of the two", "第 {0} 行：{1} 在第 {2} 行已有：请保留其一"],
  ["line {}: the anchor {} of {} is itself to be erased in line {}: choose another anchor",
    "第 {0} 行：{2} 的锚点 {1} 在第 {3} 行也要被擦除：请另选锚点"],
  ["no concept to erase: write 'concept -> anchor', one per line; in a text, a line that starts with # is a comment",
    "没有要擦除的概念：请每行写一个“概念 -> 锚点”；以 # 开头的行是注释"],
  ["a concept and its anchor need a text each, got {} -> {}", "概念和锚点都要有文字，现为 {0} -> {1}"],
  ["the anchor of {} is the concept itself: name what to draw instead, for example 'airplane -> tree'",
    "{0} 的锚点就是它自己：请写出应画的事物，例如 airplane -> tree"],
  ["concept {} has no template; 'a photo of the {}' is one", "概念 {0} 没有模板；例如 a photo of the {1}"],
  ["template {} needs the concept's place {} exactly once, as in 'a photo of the {}'",
    "模板 {0} 须恰好有一处 {1} 表示概念，例如 a photo of the {2}"],
  ["S2 = {} and S1 = {}: cosines of neighbours lie between them, so S2 must be smaller; S2 = {} and S1 = {} are the defaults of {}",
    "S2 = {0}，S1 = {1}：邻近词的余弦在两者之间，S2 必须较小；{4} 的默认值是 S2 = {2}，S1 = {3}"],
  ["{} = {}: it must be {}", "{0} = {1}：应为 {2}"],
  ["no prompt to draw: write one per line", "没有要画的提示词：请每行写一条"],
  ["the file name is empty: give one such as 'no-airplane'", "文件名为空：请填写，例如 no-airplane"],
  ["the file name {} leads out of the folder {}: give one such as 'no-airplane'",
    "文件名 {0} 超出文件夹 {1}：请改为例如 no-airplane"],
  ["a LoRA file is computed from the weights of the model: connect the original MODEL, or switch 'lora' off",
    "LoRA 文件由模型的权重算出：请连接原始模型，或关闭“lora”"],
  ["nothing to save: switch 'lora' or 'erasure_file' on", "没有要保存的内容：请打开“lora”或“erasure_file”"],
  ["the word to leave out {} names {}, which is to be erased: remove it from the list",
    "要排除的词 {0} 含有要擦除的 {1}：请从列表中删除"],
  ["the prompt to preserve {} names {}, which is to be erased: remove it from the list",
    "要保留的提示词 {0} 含有要擦除的 {1}：请从列表中删除"],
  ["the word to leave out {} is in no ring and would not have been erased; its meaning is preserved anyway",
    "要排除的词 {0} 不在任何环内，本来不会被擦除；其原意仍会保留"],
  ["the anchor {} is itself a neighbour of {} (cosine {}, S2 {}), so that images may still show {}: choose an anchor farther away",
    "锚点 {0} 本身是 {1} 的邻近词（余弦 {2}，S2 {3}），图像中可能仍有 {4}：请选更远的锚点"],
  ["the bundled model was not trained to draw the anchor {}, so that {} may still be seen; it draws a tree, a flower, a house, ...",
    "自带模型没有学过画锚点 {0}，因此可能仍会看到 {1}；它会画树、花、房子等"],
  ["{} are people, and no prompt for people is preserved, so that other people may change too: preserve 'a photo of a person'",
    "{0} 是人物，却没有保留任何关于人的提示词，其他人物也可能改变：请保留 a photo of a person"],
  ["line {}, {}, has no '->': write 'concept -> anchor', or the concept alone, which gets a suggested anchor",
    "第 {0} 行 {1} 没有“->”：请写成“概念 -> 锚点”，或只写概念以采用推荐锚点"],
  ["no anchor was named: {} -> {}; also suggested: {}", "未写锚点：{0} -> {1}；其他推荐：{2}"],
  ["line {}, {}: {}", "第 {0} 行 {1}：{2}"],
];

const patterns = MESSAGES.map(([english, chinese]) => {
  const literal = english.split("{}").map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  const [first, ...rest] = literal; // a list that stands first has commas in it
  const gaps = rest.map((part, k) => `${first || k ? "(.+?)" : "(.+)"}${part}`);
  return [new RegExp(`^${first}${gaps.join("")}$`, "s"), chinese];
});

/** A message in Chinese, as far as it is known, with the messages in it. */
export function inChinese(message) {
  for (const [pattern, chinese] of patterns) {
    const found = message.match(pattern);
    if (found) return chinese.replace(/\{(\d)\}/g, (_, place) => inChinese(found[Number(place) + 1]));
  }
  return message;
}
