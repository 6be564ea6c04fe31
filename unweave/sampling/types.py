"""stub"""
__all__ = ["DataType"]
