// Cuts PTX text into words, numbers and signs.
#pragma once

#include <cctype>
#include <stdexcept>
#include <string>
#include <string_view>

namespace emulator {

class Lexer {
 public:
  explicit Lexer(std::string_view text) : text_(text) { advance(); }

  std::string_view peek() const { return token_; }
  size_t position() const { return start_; }
  std::string_view slice(size_t begin, size_t end) const { return text_.substr(begin, end - begin); }
  bool at_end() const { return token_.empty(); }

  std::string_view next() {
    if (at_end()) throw std::runtime_error("PTX ends in the middle of a statement");
    const std::string_view token = token_;
    advance();
    return token;
  }
  bool accept(std::string_view token) {
    if (token_ != token) return false;
    advance();
    return true;
  }
  void expect(std::string_view token) {
    if (!accept(token)) fail(std::string("expected ") + std::string(token));
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("PTX: " + what + " before: " + std::string(text_.substr(start_, 60)));
  }

 private:
  static bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.'; }
  bool at(size_t i, std::string_view what) const { return text_.substr(i, what.size()) == what; }

  void skip_blanks() {
    for (;;) {
      while (end_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[end_]))) ++end_;
      if (at(end_, "//")) {
        end_ = std::min(text_.find('\n', end_), text_.size());
      } else if (at(end_, "/*")) {
        end_ = std::min(text_.find("*/", end_) + 2, text_.size());
      } else {
        return;
      }
    }
  }

  void advance() {
    skip_blanks();
    start_ = end_;
    if (start_ < text_.size()) {
      if (text_[start_] == '"') {
        end_ = std::min(text_.find('"', start_ + 1), text_.size() - 1) + 1;
      } else if (is_word(text_[start_])) {
        // `ld.global.L2::128B` is one word, `label:` is two.
        while (end_ < text_.size() && (is_word(text_[end_]) || at(end_, "::"))) end_ += at(end_, "::") ? 2 : 1;
      } else {
        ++end_;
      }
    }
    token_ = text_.substr(start_, end_ - start_);
  }

  std::string_view text_, token_;
  size_t start_ = 0, end_ = 0;
};

}  // namespace emulator
